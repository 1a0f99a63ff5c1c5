"""The kernels of the backward; `launches` says in which order they run."""
