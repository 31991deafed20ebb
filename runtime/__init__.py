"""What stands around the training loop and the scripts: none of it is needed to understand PixNerd.

for all     files (whole files, pictures, weights, UserError), machine (device, precision, compiling), checkpoint, flops
training    options (the flags), auto (--size auto), loader, distributed, stopping, gauges,
            frequencies (a weighted loss), optimizers, recompute, plan (what a run costs)
its folder  run_folder (what is resumed, what is pruned), log, previews
data        some_classes (--classes), crops (pictures kept in memory), imagenette (a download)
sampling    choices (names -> numbers), pictures (grids, films), sampling_cost, shards (50,000 samples, resumable)
the page    asked (its controls, checked), jobs (one at a time), inside (what a token wrote), page (the layout)
evaluation  picture_sets (what is compared), feature_networks, eval_report
"""
