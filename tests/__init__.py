"""The tests mirror the tree.

tests/A/test_B.py tests the module A/B.py, whose name may start with an underscore, or what the
modules of the folder A/B share. What fits neither is listed with its reason in test_tree.py.

Files without test_ in their name hold what tests share.
"""
