"""Reports and invoices as one self-contained page of HTML."""
