"""Start ComfyUI's main.py from a cached build: launch.py TREE PACKAGES [main.py's own arguments].

torchvision in PACKAGES lacks its compiled part. Importing it needs no more of that than the signatures of two
operators, so they are declared here; no node that the tests run calls them.
"""

import os
import runpy
import sys

import torch

tree, packages = sys.argv[1:3]
if os.path.isdir(os.path.join(packages, "torchvision")):  # noqa: PTH112, PTH118 - nothing else is imported before main.py
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

sys.argv = ["main.py", *sys.argv[3:]]
sys.path[0] = tree
runpy.run_path(os.path.join(tree, "main.py"), run_name="__main__")  # noqa: PTH118
