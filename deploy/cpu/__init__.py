"""CPU runtime: oneDNN's int8 kernels, and networks rewritten so that little else takes time."""
