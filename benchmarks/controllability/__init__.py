"""How far is the classifier under control? All methods on real and planted tasks and shifts, over several seeds.

python -m benchmarks.controllability --output runs/controllability --seeds 5 --jobs 2
"""
