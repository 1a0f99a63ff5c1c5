"""What tests and benchmarks share: named problems, inputs for them, and the error that each may have."""
