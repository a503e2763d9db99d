"""Tables, pages and figures from records.

Nothing here trains, evaluates or measures.
"""
