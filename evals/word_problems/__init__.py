"""
Vectors against full fine-tuning on word problems: the data, the warm start and the choice of problems of the
comparisons `recipes/configs/compare-word-problems-*.yaml`. The commands, in order:

    python -m evals.word_problems.problems   training, validation and test problems, split by template
    python -m evals.word_problems.warm_start one LoRA adapter that makes answers short and boxed
    python -m evals.word_problems.select     training problems that are neither always nor never solved
    steer compare --config compare-word-problems-0.5b
"""
