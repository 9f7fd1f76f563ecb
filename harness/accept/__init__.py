"""What the first person with a GPU runs: does this project compute there what it computes on a CPU?"""
