"""Whole models on disk: writing and reading directories of safetensors files, atomically and validated.

Also transformers' own reading and writing of HQQ layers. It may import `hqq_oft.quant` and `hqq_oft.ops`; the tuner and
the command line import it.
"""
