"""The LivePortrait networks (arXiv 2407.03168) in plain PyTorch, with the published key names.

F appearance and M motion look at a picture, W warps the feature volume by 21 keypoints, G draws it, S stitches.
"""
