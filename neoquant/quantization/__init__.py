"""From a recipe to a quantized checkpoint: plan, round, write, resume, describe, convert."""
