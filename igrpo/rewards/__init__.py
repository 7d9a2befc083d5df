"""What a completion is worth: reward functions, and the processes that run them."""
