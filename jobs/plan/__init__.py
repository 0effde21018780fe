"""What a run will need, from its configuration alone: sizes, memory, time, communication, checkpoints, failures.

Pure functions of numbers: neither torch nor ray nor deepspeed is imported, no file but the configuration is read.
"""
