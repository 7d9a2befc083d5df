"""The two stages on top of other trainers. Nothing here is imported unless you import it.

trl        IGRPOTrainer: drafts before refinements, on TRL's trainer with this repository's loss
"""
