"""Flatmin: does Sharpness-Aware Minimization help when you fine-tune an ImageNet classifier?"""
