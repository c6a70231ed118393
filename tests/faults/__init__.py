"""Hurts the real program and checks what it promises: kills, signals, damaged files, full disks, nonsense as input.

    python -m tests.faults                 the part that CI runs
    python -m tests.faults --all           everything, and a table
    python -m tests.faults --fuzz=2000     that many cases of each property of fuzz.py

tiny.py is the run that is hurt, process.py starts the program, worker.py runs many command lines in one process.
"""
