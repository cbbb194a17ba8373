"""What a model on an accelerator can reach at best, predicted from bytes and FLOPs."""
