"""What an answer says, and whether it says what the reference says.

From the ground: `units`, `latex`; `numbers`, `structure`; `symbolic` (sympy, in a worker only); `worked_out`
(plain numbers); `equality`, whose `compare` is what `steer.tasks.grading` calls.
"""
