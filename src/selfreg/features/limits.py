"""How many features are chosen at most where nobody says, in Python and in recipes."""

MAX_FEATURES = 100
"""By keywords, and by a judge in a recipe."""
MAX_ATTRIBUTE_FEATURES = 30
"""By attribute: the strongest. More cost the tasks score and hardly moved worst groups (docs/evidence.md)."""
