"""Flax NNX building blocks of models."""
