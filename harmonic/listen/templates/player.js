// Runs on the audio thread: plays pieces in their order, and says what was heard.
class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.report = new Float32Array(128 * Math.max(1, Math.round(sampleRate / 16 / 128)));  // a sixteenth of a second
    this.filled = 0;
    this.clear(0);
    this.need = 0;
    this.last = 0;
    this.port.onmessage = ({ data }) => {
      if (data.need !== undefined) this.need = data.need;
      if (data.stream !== undefined) this.clear(data.stream);
      if (data.samples) this.add(data.position, data.samples);
    };
  }

  clear(stream) {
    if (this.filled) this.tell();
    Object.assign(this, { stream, queue: [], position: 0, end: 0, filled: 0, flowing: false });
  }

  // A piece takes the place of what was there, from its position on: it was made again with other settings.
  add(position, samples) {
    while (this.queue.length && this.queue.at(-1).position >= position) this.queue.pop();
    const tail = this.queue.at(-1);
    if (tail && tail.position + tail.samples.length > position)
      tail.samples = tail.samples.subarray(0, position - tail.position);
    this.end = position + samples.length;
    if (this.end > this.position) this.queue.push({ position, samples });
    else this.end = this.position;
  }

  tell() {
    const samples = this.report.slice(0, this.filled);
    this.port.postMessage({ stream: this.stream, position: this.position, samples, ahead: this.end - this.position,
      flowing: this.flowing }, [samples.buffer]);
    this.filled = 0;
  }

  process(_, [[out]]) {
    const before = this.flowing;
    let done = 0;
    this.flowing ||= this.queue.length > 0 && this.end - this.position >= this.need;
    while (this.flowing && done < out.length) {
      const head = this.queue[0];
      if (!head) {
        this.flowing = false;
        break;
      }
      const from = Math.max(0, this.position - head.position);
      const part = head.samples.subarray(from, from + out.length - done);
      out.set(part, done);
      done += part.length;
      this.position = head.position + from + part.length;
      if (from + part.length >= head.samples.length) this.queue.shift();
    }
    if (done) this.last = out[done - 1];
    if (this.filled + done > this.report.length) this.tell();
    this.report.set(out.subarray(0, done), this.filled);
    this.filled += done;
    if (this.filled === this.report.length || this.flowing !== before) this.tell();
    for (let i = done; i < out.length; i++) out[i] = this.last *= 0.98;  // no click where the sound ends
    return true;
  }
}
registerProcessor("player", Player);
