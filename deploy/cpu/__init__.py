"""CPU runtime: oneDNN's int8 kernels, and networks rewritten so that little else takes time.

`torch.compile` leaves these layers as they are: it could fuse nothing into their kernels, and would compile
anew for every step, whose scales are Python numbers here.
"""
