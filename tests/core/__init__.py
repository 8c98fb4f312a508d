"""The pure core: calendar periods, the formulas of units, and which limits a call touches."""
