"""Training towards a teacher: the float model's outputs, a trainer on top of transformers', signs that train."""
