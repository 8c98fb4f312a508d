"""What bills and people are told: usage, cost, limits and invoices, with evidence of their completeness."""
