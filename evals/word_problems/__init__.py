"""
Data for a comparison of vectors with full fine-tuning on word problems. The commands, in order:

    python -m evals.word_problems.problems   training, validation and test problems, split by template
    python -m evals.word_problems.warm_start one LoRA adapter that makes answers short and boxed
    python -m evals.word_problems.select     training problems that are neither always nor never solved

What they write is for `train_data`, `eval_data` and `base_adapter` of a plan of `steer compare`.
"""
