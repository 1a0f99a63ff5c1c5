"""What the kernels of every generation share that decode against a cache: `work` is where to begin."""
