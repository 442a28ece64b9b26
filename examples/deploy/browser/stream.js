// A model that takes its frames step by step (export_onnx.py --browser): the state that comes out of
// a step goes into the next.

export const canStream = (session) => session.inputNames.length > 1;

export class Stream {
  // `window`: steps that are classified together. The classifier is linear, so the logits of a mean are mean logits.
  constructor(session, window = Infinity) {
    Object.assign(this, { session, window, logits: [] });
    const inputs = session.inputMetadata.map(({ name, type, shape }) => ({
      name, type, shape: shape.map((side) => (typeof side === "number" ? side : 1)) }));
    this.tubelet = inputs.find(({ name }) => name === "pixel_values").shape[1];
    this.state = Object.fromEntries(inputs.filter(({ name }) => name !== "pixel_values").map(({ name, type, shape }) => {
      const count = shape.reduce((a, b) => a * b, 1);
      const zeros = type === "int64" ? new BigInt64Array(count) : new Float32Array(count);
      return [name, new ort.Tensor(type, zeros, shape)];
    }));
  }

  // Takes the next frames, { data, shape: [1, T, 3, H, W] }, whole steps; gives the logits after the last one.
  async take({ data, shape: [, frames, ...picture] }) {
    const size = data.length / frames;
    for (let first = 0; first + this.tubelet <= frames; first += this.tubelet) {
      const step = data.subarray(first * size, (first + this.tubelet) * size);
      const pixel_values = new ort.Tensor("float32", step, [1, this.tubelet, ...picture]);
      const outputs = await this.session.run({ pixel_values, ...this.state });
      for (const name of Object.keys(this.state)) this.state[name] = outputs[`next.${name}`];
      this.logits.push(outputs.logits.data);
      if (this.logits.length > this.window) this.logits.shift();
    }
    return this.logits[0].map((_, i) => this.logits.reduce((sum, each) => sum + each[i], 0) / this.logits.length);
  }
}
