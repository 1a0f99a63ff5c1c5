"""What the kernels of all GPU generations share: all that is Pallas Mosaic GPU and depends on no generation."""
