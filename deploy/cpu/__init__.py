"""CPU runtime: int8 kernels (errata's own and oneDNN's), and networks rewritten around them.

`kernels` says which kernel runs which layer, `int8` has the layer, `vnni` and `native` call errata's own C
code, and `fusion` rewrites the network so that little else takes time.

`torch.compile` skips these layers. It could fuse nothing into their kernels, and it would compile again for
every step, because the scales of a step are Python numbers here.
"""
