"""What is checked: this machine, and that every way of training is the same."""
