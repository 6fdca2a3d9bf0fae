"""`sdrt bench`: what a bundle takes on this machine, beside others that run the same model.

Whoever is measured has a process of its own, and they take turns: a slow moment of the machine falls on all alike, and
nobody's threads, allocator or libraries are another's.
"""
