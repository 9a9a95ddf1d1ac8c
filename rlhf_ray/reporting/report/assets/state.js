"use strict";

// What the reader chose, kept in the address, so that a view can be sent to someone else.
class State {
  constructor() {
    this.values = new URLSearchParams(location.hash.slice(1));
  }

  get(name, otherwise, allowed = null) {
    const value = this.values.get(name);
    return value === null || (allowed !== null && !allowed.includes(value)) ? otherwise : value;
  }

  set(name, value) {
    if (value === null || value === "") this.values.delete(name);
    else this.values.set(name, value);
    history.replaceState(null, "", `#${this.values}`);
  }
}
