"""One run on a machine with a GPU that says whether the kernels are right there and how fast they are."""
