"""From an entry to what it costs: pure, exact, and the same in SQL and as whole numbers for budgets."""
