"""What tests share: fakes, tiny checkpoints, marks, and the store of compile outcomes."""
