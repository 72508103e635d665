"""What is known of each library's classes: one file a library, with its name, loaded when one of its modules is met.

Such a file adds to the tables of `surgery.fused`, `folded` and `around`, and has the replacement classes. Nothing else
knows the library's names.
"""
