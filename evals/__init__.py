"""
Benchmarks, scores and honest comparisons: `python -m evals.run`, then `evals.compare`, `evals.browse` and
`evals.grading_check` on the folder it wrote.
"""

import os

from steer.threads import passive_waiting

os.environ.update(passive_waiting())
