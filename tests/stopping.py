"Stopping a run at any of its stopping places."

def stop_after(trainer, n):
    "Ask for a stop when the run has come by a stopping place `n` times; a list that counts them."
    breathe, count = trainer._breathe, [0]
    def counted():
        count[0] += 1
        if count[0] == n: trainer.stop()
        breathe()
    trainer._breathe = counted
    return count
