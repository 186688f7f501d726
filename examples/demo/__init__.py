"""The main job on real text: quantize a small Llama, fine-tune it with OFT, save, load, merge, unmerge."""
