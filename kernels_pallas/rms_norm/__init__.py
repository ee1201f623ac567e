"""RMSNorm of activations, with the sum of the residual stream and a block's output before it."""
