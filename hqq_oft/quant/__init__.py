"""HQQ's layers: reading, building, moving and quantizing them.

What is known about HQQ's classes, their attributes and their metadata belongs here. It may import `hqq_oft.ops`;
`hqq_oft.tuner` and `hqq_oft.checkpoint` import it.
"""
