"""Operations on rotations and quantized weights: the contract between the mathematics and the kernels.

Here are the table of operations, the backends that compute them, their derivatives' autograd nodes, and the plain
PyTorch reference. Every other part of the package may import it; it imports none of them, and knows neither PEFT nor
HQQ's classes.
"""
