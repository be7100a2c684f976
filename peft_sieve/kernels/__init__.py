"""Experts as products on rows sorted by expert, forward and backward: in PyTorch and, on GPUs, in Triton.

Nothing here knows of PEFT or transformers. `expert_function` is where a layer's forward comes in.
"""
