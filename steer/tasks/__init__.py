"""Math tasks: problems, the prompts that ask them, the verdict on an answer, and the reward it earns."""
