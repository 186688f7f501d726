"""Scripts that users start from; a package, so that `python -m examples.demo` runs these and no other `examples`."""
