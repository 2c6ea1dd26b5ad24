"""The check of everything that needs a GPU: see `python -m evals.gpu_check --help` and docs/gpu.md."""
