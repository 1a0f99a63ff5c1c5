"""The backward: `gradients` runs the kernels of the others in their order."""
