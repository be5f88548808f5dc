"""Data shown to people: `bagel-ds inspect` (packs and the plan's numbers) and `bagel-ds check` (every row).

Promises: everything shown is what training would use; data files are only read. The room may import all others of
data, and of model its batch and attention layout. Begin with packs.py (packs as text) and sheet.py (as pictures),
plan_numbers.py (how full and equal packs are), check.py (rows that can't be used).
"""
