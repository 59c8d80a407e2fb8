"""What a student can be: a specification, the families it can be cut from, and the ordinary model it becomes."""
