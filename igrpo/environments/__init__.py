"""Environments: tools that the policy calls between its turns, and the processes that run them."""
