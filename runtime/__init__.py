"""What stands around the training loop and the scripts: none of it is needed to understand PixNerd.

options      the flags of train.py: one table, with ranges and the recipe of each size
checkpoint   saving that survives a crash, loading that trusts nothing
run_folder   a run's folder: which checkpoint to resume, whether it is the same run, what is pruned
distributed  the processes of torchrun: how they meet and decide together
stopping     the vote on ending, the watch on numbers that are not finite
log          metrics.jsonl, the terminal, TensorBoard, Weights & Biases
previews     the pictures that a run shows of itself
pictures     grids, GIFs, files with their settings inside
picture_sets the pictures that eval_fid.py compares, as streams
choices      --class, --resolution and --upscale in words -> numbers
sampling_cost  whether a sampling run fits into memory, whether compiling it pays
shards       50,000 samples by several processes, resumable
machine      device, precision, compiling, memory
recompute    activation checkpointing
optimizers   AdamW and Muon
plan         what a run will cost
files        saving whole files, downloads, lists of pictures; UserError
"""
